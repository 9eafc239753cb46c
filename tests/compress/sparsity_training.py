"""A small problem and loop for the penalties."""

import torch
import torch.nn.functional as F
from torch import nn


class SmallNet(nn.Module):
    """Three convolutions and a hidden layer, wider than the problem needs."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))


EXAMPLE = torch.zeros(1, 1, 8, 8)
SCHEDULE = [0.1] * 4 + [0.05] * 4


def problem(images=96):
    """Which quarter of the image is the brightest."""
    random = torch.Generator().manual_seed(5)
    x = torch.rand(images, 1, 8, 8, generator=random)
    y = torch.randint(4, (images,), generator=random)
    for image, quarter in zip(x, y.tolist(), strict=True):
        row, column = divmod(quarter, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return x, y


def make_optimizer(kind, net, lr=0.1):
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), lr=lr)
    if kind == "momentum":
        return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True)
    if kind == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=lr / 20, amsgrad=True)
    return torch.optim.Adam(net.parameters(), lr=lr / 20)


def train(net, optimizer, penalties, epochs, *, scale=1.0, autocast=False, batch=24):
    """Epochs of the schedule with the numbers in ``epochs``; the last epoch's mean loss."""
    x, y = problem()
    for epoch in epochs:
        lr = SCHEDULE[epoch] * scale
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for at in range(0, len(x), batch):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(net(x[at : at + batch]), y[at : at + batch])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            for penalty in penalties:
                penalty.after_step(lr)
        for penalty in penalties:
            penalty.end_epoch(lr)
    return sum(losses) / len(losses)
