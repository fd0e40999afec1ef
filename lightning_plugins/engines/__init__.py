"""Plain torch and numpy: what is computed. No Lightning below this folder."""
