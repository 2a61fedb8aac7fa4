"""Speed and quality, run by hand or by `make bench`; nothing here is timed in tests."""
