"""A data set of random crops of another data set's pictures."""

import torch
from torch.utils.data import Dataset

from ldm.util import instantiate_from_config


class RandomCrops(Dataset):
    """Square crops, `size` pixels wide, of the pictures [H, W, 3] of the data set that the config `dataset` describes.

    An autoencoder is convolutional, so that crops teach it what it needs for whole pictures, at a quarter of the cost.
    Raises ValueError for a picture smaller than a crop.
    """

    def __init__(self, dataset: dict, size: int, image_key: str = "image"):
        self.dataset = instantiate_from_config(dataset)
        self.size = size
        self.image_key = image_key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        image = self.dataset[index][self.image_key]
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise ValueError(f"crops of {self.size} pixels do not fit into pictures of {width}x{height}")
        top = torch.randint(height - self.size + 1, ()).item()
        left = torch.randint(width - self.size + 1, ()).item()
        return {self.image_key: image[top : top + self.size, left : left + self.size]}
