"""Every golden fixture against the code that the program runs."""
