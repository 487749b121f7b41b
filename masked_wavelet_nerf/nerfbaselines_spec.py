"""What nerfbaselines finds by its entry point; needs nerfbaselines, and nothing else imports it."""

from __future__ import annotations

from nerfbaselines import MethodSpec, register  # pyright: ignore[reportMissingImports]

MaskedWaveletSpec: MethodSpec = {
    "id": "masked-wavelet",
    "method_class": "masked_wavelet_nerf.nerfbaselines_method:NerfbaselinesMethod",
    "metadata": {
        "name": "Masked Wavelet NeRF",
        "description": (
            "Planes of masked wavelet coefficients as a compact radiance field: a trainable mask "
            "drops most coefficients, and an entropy coder writes the rest as a file of some "
            "hundred kilobytes. What is rendered and measured is what that file holds."
        ),
        "paper_title": "Masked Wavelet Representation for Compact Neural Radiance Fields",
        "paper_authors": [
            "Daniel Rho",
            "Byeonghyeon Lee",
            "Seungtae Nam",
            "Joo Chan Lee",
            "Jong Hwan Ko",
            "Eunbyung Park",
        ],
        "paper_link": "https://arxiv.org/pdf/2212.09069.pdf",
        "licenses": [{"name": "Apache 2.0"}],
    },
    "presets": {
        "blender": {
            "@apply": [{"dataset": "blender"}],
            "@description": "Objects in a box around the origin, on white: the paper's setting.",
            "method": "masked-wavelet-bounded",
        },
    },
}
"""Scenes of other data sets are unbounded: the method's defaults."""

register(MaskedWaveletSpec)
