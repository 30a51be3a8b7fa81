"""Writes seven_logits.pt: TorchScript without torch, a module that gives seven numbers for every picture."""
import pathlib
import zipfile

CODE = """class Seven(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  def forward(self: __torch__.Seven,
    x: Tensor) -> Tensor:
    brightness = torch.mean(x, [1, 2, 3])
    return torch.repeat(torch.unsqueeze(brightness, 1), [1, 7])
"""
PARTS = {
    "data.pkl": b"\x80\x02c__torch__\nSeven\n)\x81}X\x08\x00\x00\x00training\x89sb.",
    "code/__torch__.py": CODE.encode(),
    "constants.pkl": b"\x80\x02).",
    "version": b"3\n",
}

with zipfile.ZipFile(pathlib.Path(__file__).with_name("seven_logits.pt"), "w") as archive:
    for name, data in PARTS.items():
        # a fixed date: the same bytes every time
        archive.writestr(zipfile.ZipInfo(f"seven_logits/{name}"), data)
