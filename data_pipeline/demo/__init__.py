"""What the demo corpus is made of: pictures of scanned digits, sentences about them, voices, library text."""
