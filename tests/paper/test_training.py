"""The model against transformers and a naive transcription; a killed training against one that was not."""

import json
import math

import pytest
import torch
from transformers import ViTMAEForPreTraining

from specbasis.architecture.recognise import model_map
from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from specbasis.paper.mae import MAE, load_weights, new_classifier, new_mae, positions
from specbasis.paper.training import CLASSIFY, NEW_TASK, PRETRAINING, SAME_TASK, _seed, train
from tests.paper.pico import TINY, images, state_of, training


def test_the_papers_sizes():
    with torch.device("meta"):
        model = ViTMAEForPreTraining(MAE().config())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(model.vit.layers) == 6
    assert len(model.decoder.decoder_layers) == 2
    assert shapes["vit.embeddings.patch_embeddings.projection.weight"] == (192, 3, 4, 4)
    assert shapes["decoder.decoder_embed.weight"] == (64, 192)
    assert shapes["decoder.decoder_pred.weight"] == (48, 64)
    assert (model.config.num_attention_heads, model.config.decoder_num_attention_heads) == (3, 4)
    assert (MAE().patches, model.config.mask_ratio, model.config.norm_pix_loss) == (64, 0.6, False)
    assert (PRETRAINING.epochs, PRETRAINING.rate, PRETRAINING.weight_decay) == (200, 1.5e-3, 1e-4)
    assert (PRETRAINING.batch, PRETRAINING.clip, PRETRAINING.total(50_000)) == (64, 1.0, 200 * 782)
    assert (SAME_TASK.epochs, SAME_TASK.rate, NEW_TASK.epochs, NEW_TASK.rate) == (10, 3e-3, 10, 1.5e-3)


def test_positions_are_a_transcription_of_the_formula_and_frozen():
    table = positions(3, 8).double()
    assert not table[0].any()
    for row in range(3):
        for column in range(3):
            want = [
                f(place * 10000 ** (-j / 2))
                for place in (column, row)
                for f in (math.sin, math.cos)
                for j in range(2)
            ]
            torch.testing.assert_close(
                table[1 + 3 * row + column], torch.tensor(want, dtype=torch.float64), atol=1e-7, rtol=0
            )
    model = new_mae(TINY, seed=0)
    for embedded in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert torch.equal(embedded[0], positions(2, 8))
        assert not embedded.requires_grad
    assert model.decoder.mask_token.any()


def test_the_loss_is_the_mean_square_over_hidden_patches():
    model = new_mae(TINY, seed=0).eval()
    x = torch.rand(2, 3, 8, 8)
    noise = torch.tensor([[0.1, 0.9, 0.8, 0.2], [0.9, 0.1, 0.2, 0.8]])  # two of four patches are kept
    with torch.no_grad():
        out = model(x, noise=noise)
    total, count = 0.0, 0
    for image, hidden in ((0, (1, 2)), (1, (0, 3))):
        for patch in hidden:
            row, column = divmod(patch, 2)
            want = x[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            total, count = total + float((out.logits[image, patch] - want).square().mean()), count + 1
    assert float(out.loss) == pytest.approx(total / count, rel=1e-5)


def test_a_classifier_pools_patches_and_takes_the_encoder_of_a_checkpoint(tmp_path):
    run = train(images(), images(8, seed=1), tmp_path / "run", mae=TINY, training=training(steps=2), device="cpu")
    model = new_classifier(TINY, 3, seed=5).eval()
    load_weights(model, run.best, "vit.")
    stored = open_checkpoint(run.best)
    assert torch.equal(model.vit.layers[0].mlp.fc1.weight, stored["vit.layers.0.mlp.fc1.weight"])
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        embedded = model.vit.embeddings.patch_embeddings(x) + positions(2, 8)[1:]
        tokens = torch.cat([model.vit.embeddings.cls_token.expand(2, 1, 8), embedded], dim=1)
        for layer in model.vit.layers:
            tokens = layer(tokens)
        want = model.vit.layernorm(tokens)[:, 1:].mean(dim=1) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(x), want)


def test_a_checkpoint_is_a_folder_of_transformers_with_roles(tmp_path):
    run = train(images(), images(8, seed=1), tmp_path / "run", mae=TINY, training=training(), device="cpu")
    assert [path.name for path in run.checkpoints] == [f"checkpoint-{n}" for n in (0, 3, 6, 9)]
    theirs = ViTMAEForPreTraining.from_pretrained(str(run.checkpoints[-1])).state_dict()
    ours = open_checkpoint(run.checkpoints[-1])
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    mapped = model_map(open_checkpoint(run.best))
    roles = {(ref.key.stack, ref.key.block, ref.key.role) for ref in mapped.matrices}
    assert {("vit", 1, "ffn.down"), ("vit", 0, "attention.query"), ("decoder", 0, "ffn.up")} <= roles
    log = run.log
    assert [entry["step"] for entry in log] == [3, 6, 9]
    best = json.loads((run.best / "best.json").read_text())
    assert best["validation"] == min(entry["validation"] for entry in log)


class KilledError(Exception):
    pass


@pytest.mark.parametrize(("task", "kill_at"), [("reconstruct", 1), (CLASSIFY, 5), ("reconstruct", 6)])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, task, kill_at):
    data, validation = images(), images(8, seed=1)
    how = training(task=task)

    def run(folder, kill=None):
        def tell(progress):
            if progress.done == kill:
                raise KilledError

        return train(data, validation, folder, mae=TINY, training=how, progress=tell, device="cpu")

    whole = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill=kill_at)
    (kept,) = (tmp_path / "killed").glob("state-*.safetensors")
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"state-\d+\.safetensors: (is not what was written|truncated)"):
        run(tmp_path / "killed")
    kept.write_bytes(content)
    continued = run(tmp_path / "killed")
    first, second = state_of(whole), state_of(continued)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[c][name], second[c][name]) for c in first for name in first[c])
    logs = [[{k: v for k, v in entry.items() if k != "seconds"} for entry in r.log] for r in (whole, continued)]
    assert logs[0] == logs[1]
    assert continued.is_done
    assert not list(continued.folder.glob("state-*"))
    steps = []
    train(
        data,
        validation,
        whole.folder,
        mae=TINY,
        training=how,
        progress=lambda p: steps.append(p.done),
        device="cpu",
    )
    assert steps == []  # what is done is not done again


def test_the_loop_is_adamw_on_a_cosine(tmp_path):
    """Against a loop written out in full."""
    data, how = images(20), training(steps=4, batch=8, checkpoints=1)
    run = train(data, images(8, seed=1), tmp_path / "run", mae=TINY, training=how, device="cpu")
    model = new_mae(TINY, how.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.5e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for step in range(4):
        epoch, place = divmod(step, 3)
        g = torch.Generator().manual_seed(_seed(0, "order", epoch))
        index = torch.randperm(20, generator=g)[8 * place : 8 * place + 8]
        noise = torch.rand(len(index), 4, generator=torch.Generator().manual_seed(_seed(0, "mask", step)))
        model(data.pixels[index].float() / 127.5 - 1, noise=noise).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    stored = open_checkpoint(run.checkpoints[-1] / "model.safetensors")
    for name, W in model.state_dict().items():
        torch.testing.assert_close(stored[name], W, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: train(images(), images(8), d, mae=TINY, training=training(rate=1e-3)), "another training"),
        (lambda d: train(images(seed=2), images(8), d, mae=TINY, training=training()), "another training"),
        (lambda d: train(images(size=16), images(8), d / "x", mae=TINY, training=training()), "16 pixels"),
        (
            lambda d: train(images(classes=1), images(8), d / "x", mae=TINY, training=training(task=CLASSIFY)),
            "classes",
        ),
        (
            lambda d: train(images(), images(8), d / "x", mae=TINY, training=training(), start=d),
            "no model.safetensors",
        ),
        (lambda d: train(images(), images(8), d.parent, mae=TINY, training=training()), "holds no training"),
        (lambda d: training(task="dream"), "want reconstruct"),
        (lambda d: training(batch=0), "at least 1"),
        (lambda d: MAE(width=10), "multiple of"),
    ],
)
def test_bad_input_is_one_line(tmp_path, call, message):
    folder = tmp_path / "run"
    train(images(), images(8), folder, mae=TINY, training=training(steps=1), device="cpu")
    with pytest.raises(InputError, match=message) as error:
        call(folder)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(InputError, match="not finite at step"):
        train(images(), images(8), tmp_path / "r", mae=TINY, training=training(rate=1e30), device="cpu")
