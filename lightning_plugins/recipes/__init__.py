"""What a user launches: ``lightning run NAME``."""
