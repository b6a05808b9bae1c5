"""Parts of compare_v3.py."""
