"""Codes in packed words and back: pure functions, shared by kernels that read them and formats that store them."""
