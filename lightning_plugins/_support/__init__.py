"""The cellar: what every room uses and what knows neither torch nor Lightning."""
