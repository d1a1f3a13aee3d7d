"""Tables, pictures and the performance page, made from records."""
