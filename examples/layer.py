"""A mixture-of-experts layer on its own: train it for a moment, then change its routing for one call."""

import torch

from flexpert import MoE, MoEConfig

config = MoEConfig(model_dim=64, hidden_dim=128, num_experts=8, top_k=2, capacity_factor=1.25)
print(f"{config.num_params():,} parameters, {config.num_active_params():,} of them active for a token")
moe = MoE(config)
optimizer = torch.optim.AdamW(moe.parameters(), lr=3e-3)
target = torch.nn.Linear(64, 64)
for _ in range(100):
    x = torch.randn(4, 128, 64)
    y, info = moe(x, return_info=True)
    loss = (y - target(x).detach()).square().mean() + 0.01 * info.losses["balance"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.3f}, dropped {info.stats.drop_rate.item():.1%}")
print(f"rows of each expert: {info.stats.load_E.tolist()}")
y, info = moe(x, top_k=4, capacity_factor=None, return_info=True)  # this call only
print(f"top-4, dropless: dropped {info.stats.drop_rate.item():.1%}")
