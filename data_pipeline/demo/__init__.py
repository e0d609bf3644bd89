"""The demo corpus: pictures of scanned digits, sentences about them, the sentences spoken, library text."""
