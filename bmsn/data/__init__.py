"""Images in, batches out: `open_dataset("scheme:path")`, the 50/50 split, normalisation and augmented batches."""

from bmsn.data.batches import BatchStream, normalisation, normalisation_table, normalise
from bmsn.data.dataset import ImageDataset, split_halves
from bmsn.data.readers import check_spec, open_dataset

__all__ = [
    "BatchStream",
    "ImageDataset",
    "check_spec",
    "normalisation",
    "normalisation_table",
    "normalise",
    "open_dataset",
    "split_halves",
]
