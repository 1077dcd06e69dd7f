"""Another project's training loop that searches: its own data and optimiser step; bmsn's space, mixture and scores.

python train_own.py: ranks the 15 architectures of a narrow ResNet-14, best first.
"""

import numpy as np
import torch
import torch.nn.functional as F

import bmsn

STEPS, BATCH, LEARNING_RATE, NUM_CLASSES = 150, 32, 0.1, 4


def draw_images(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes in noise, the finer the higher the class: (count, 3, 16, 16) float32 and (count,) int64."""
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    phase = 6.28 * torch.rand(count, 1, generator=generator)
    stripes = torch.sin(torch.arange(16) * 0.6 * (labels[:, None] + 1) + phase)  # (count, 16)
    return stripes[:, None, None] + 2 * torch.randn(count, 3, 16, 16, generator=generator), labels


def main() -> None:
    own, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    space = bmsn.SearchSpace.named("resnet14-cifar10", width=0.25)
    nets = bmsn.SupernetMixture(space, num_supernets=2, num_classes=NUM_CLASSES, generator=own)
    mixture = bmsn.BalancedMixture(num_architectures=len(space), num_supernets=2)

    architectures = rng.integers(len(space), size=STEPS + 1)  # uniform; the mixture chooses the supernet
    supernet = mixture.draw(int(architectures[0]), 1.0, rng.random())
    for step in range(STEPS):
        architecture = space[int(architectures[step])]
        images, labels = draw_images(BATCH, own)
        nets.zero_grad()
        F.cross_entropy(nets(images, architecture, supernet), labels).backward()
        with torch.no_grad():  # this project's optimiser: clipped SGD on the row that was trained
            gradient = nets.arena.grad[supernet]
            nets.arena[supernet] -= LEARNING_RATE * gradient / gradient.norm().clamp(min=1.0)
            images, labels = draw_images(BATCH, own)
            accuracy = (nets(images, architecture, supernet).argmax(1) == labels).float().mean().item()
        inverse_temperature = 1 + 99 * (step + 1) / STEPS
        following = int(architectures[step + 1])
        supernet = mixture.observe_and_draw(
            architecture.index, supernet, accuracy, inverse_temperature, following, rng.random()
        )

    assigned = mixture.best_supernet(100.0)
    pairs = [(architecture, int(assigned[architecture.index])) for architecture in space]
    scores = bmsn.score_architectures(nets, *draw_images(512, own), pairs)  # all of them in one pass
    for index in scores.correct.argsort(descending=True, stable=True).tolist():
        print(f"{pairs[index][0]}  {scores.accuracy[index]:.3f}  supernet {pairs[index][1]}")


if __name__ == "__main__":
    main()
