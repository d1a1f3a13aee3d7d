"""The results page, made from recorded files alone."""
