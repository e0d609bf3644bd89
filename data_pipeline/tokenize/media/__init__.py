"""What raw files hold, whatever tokenizer reads them: how to decode it, and how to judge a round trip."""
