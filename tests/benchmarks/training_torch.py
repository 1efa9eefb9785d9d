"""The same net and training step in PyTorch, for tests/benchmarks/training.py.

PyTorch is no dependency of the project: ``pip install torch`` beside it.
"""

import numpy as np

SIGMA_MIN, SIGMA_MAX = 0.01, 20.0  # those of VE()
PEAK_RATE, EMA_EXPONENT = 2e-3, 6.94


def by_torch(config, data, num_steps, batch_size):
    """Return a function that trains the same MLP in PyTorch; its key is ignored."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "The comparison needs PyTorch beside this project: pip install torch."
        ) from error
    rows = torch.tensor(np.array(data))
    rows = (rows - rows.mean(0)) / rows.std(0)

    def train(_):
        net = build(torch, config)
        average = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.Adam(net.parameters(), lr=PEAK_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        losses = []
        for k in range(1, num_steps + 1):
            x0 = rows[torch.randint(len(rows), (batch_size,))]
            loss = denoising_loss(torch, net, x0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            share = 1 - (1 - 1 / k) ** (EMA_EXPONENT + 1)
            with torch.no_grad():
                torch._foreach_lerp_(average, list(net.parameters()), share)
            losses.append(loss.detach())
        return torch.stack(losses)

    return train


def denoising_loss(torch, net, x0):
    """Return the weighted loss at log-normal levels, stratified as in the package."""
    size = len(x0)
    strata = (torch.arange(size) + torch.rand(size)) / size
    normal = torch.distributions.Normal(0.0, 1.0)
    level = torch.exp(normal.icdf(strata.clamp(1e-4, 1 - 1e-4)) * 1.8 - 0.5)
    level = level.clamp(SIGMA_MIN, SIGMA_MAX)[:, None]
    x = x0 + level * torch.randn_like(x0)
    scale = torch.rsqrt(1 + level**2)
    skip = scale**2
    out = level * scale * level / torch.sqrt(level**2 + 0.1**2)
    denoised = skip * x + out * net(scale * x, torch.log(level[:, 0]) / 4)
    return torch.mean((denoised - x0) ** 2 / out**2)


def build(torch, config):
    """Return the MLP of the package: noise embedding, FiLM, residual blocks."""
    nn, width = torch.nn, config.width
    silu = torch.nn.functional.silu

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.input = nn.Linear(width, width)
            self.film = nn.Linear(width, 2 * width)
            self.output = nn.Linear(width, width)
            nn.init.zeros_(self.output.weight)

        def forward(self, x, embedding):
            shift, scale = self.film(embedding).chunk(2, dim=-1)
            h = self.input(self.norm(x)) * (1 + scale) + shift
            return x + self.output(silu(h))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_in, self.embed_out = (
                nn.Linear(32, width),
                nn.Linear(width, width),
            )
            self.input = nn.Linear(config.size, width)
            self.blocks = nn.ModuleList([Block() for _ in range(config.depth)])
            self.norm = nn.LayerNorm(width)
            self.output = nn.Linear(width, config.size)
            nn.init.zeros_(self.output.weight)

        def forward(self, x, noise):
            angles = noise[:, None] * 2.0 ** torch.linspace(-2, 4, 16)
            features = torch.cat([angles.sin(), angles.cos()], -1)
            embedding = silu(self.embed_out(silu(self.embed_in(features))))
            h = self.input(x)
            for block in self.blocks:
                h = block(h, embedding)
            return self.output(silu(self.norm(h)))

    return Net()
