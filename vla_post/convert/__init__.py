"""Converters between trajectory stores and other people's formats; lerobot and mcap load when
used."""
