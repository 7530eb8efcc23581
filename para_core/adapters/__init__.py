"""The borders: each file here, and no other, knows one host."""
