"""A model's weights shared by ranks: each holds a part of every layer, and a layer is whole only while it is used."""
