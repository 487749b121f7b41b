"""Data parsers of nerfstudio for captures that it cannot read itself."""
