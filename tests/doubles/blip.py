"""The structure of BLIP and of LAVIS: heads called with strings, which they tokenise themselves, after the image."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .albef import Vit
from .text import Bert, FusionBert, MixedBert, Output

LONGEST = 9


class Tokens(Output):
    def to(self, device: Any) -> Tokens:
        return Tokens({name: ids.to(device) for name, ids in self.items()})


class Tokenizer:
    """Words by the sum of their letters, between a first and a last token."""

    pad_token_id, cls_token_id, sep_token_id, enc_token_id, bos_token_id = 0, 1, 2, 3, 4

    def __call__(
        self,
        texts: list[str],
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str = "",
    ) -> Tokens:
        assert isinstance(texts, list) and return_tensors == "pt"
        rows = [[5 + sum(map(ord, word)) % 90 for word in text.split()] for text in texts]
        rows = [row[: max_length - 2] if truncation and max_length else row for row in rows]
        length = max_length if padding == "max_length" else 2 + max(map(len, rows))
        ids = torch.zeros(len(rows), length or 0, dtype=torch.long)
        for place, row in zip(ids, rows):
            place[: len(row) + 2] = torch.tensor([self.cls_token_id, *row, self.sep_token_id])
        return Tokens(input_ids=ids, attention_mask=(ids != self.pad_token_id).long())


def _seen(states: Tensor) -> dict[str, Tensor]:
    return dict(encoder_hidden_states=states, encoder_attention_mask=torch.ones(states.shape[:-1], dtype=torch.long))


class Head(nn.Module):
    def __init__(self, words: nn.Module, eyes: nn.Module, twins: bool = False) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.eyes, self.words = eyes, words
        self.text_proj, self.vision_proj, self.score = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 2)
        if twins:
            self.eyes_slow, self.words_slow = copy.deepcopy(self.eyes), copy.deepcopy(self.words)
            for weight in (*self.eyes_slow.parameters(), *self.words_slow.parameters()):
                weight.requires_grad = False

    def contrast(self, states: Tensor, embeds: Tensor) -> Tensor:
        images, texts = self.vision_proj(states[:, 0]), self.text_proj(embeds[:, 0])
        similarity = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        return F.cross_entropy(similarity, torch.arange(len(images)))


class Retrieval(Head):
    """The text alone begins with [CLS], that of a pair with [ENC]; pairs first, then pairs with another image."""

    def __init__(self) -> None:
        super().__init__(MixedBert(), Vit(), twins=True)

    def forward(self, picture: Tensor, caption: list[str], alpha: float = 0.0) -> tuple[Tensor, Tensor]:
        states = self.eyes(picture)
        text = self.tokenizer(
            caption, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(picture.device)
        alone = dict(attention_mask=text.attention_mask, return_dict=True, mode="text")
        embeds = self.words(text.input_ids, **alone).last_hidden_state
        with torch.no_grad():
            slow = self.contrast(self.eyes_slow(picture), self.words_slow(text.input_ids, **alone).last_hidden_state)
        ids = text.input_ids.clone()
        ids[:, 0] = self.tokenizer.enc_token_id
        logits = []
        for image in (states, states.roll(1, dims=0)):
            read = dict(attention_mask=text.attention_mask, return_dict=True, **_seen(image))
            logits.append(self.score(self.words(ids, **read).last_hidden_state[:, 0]))
        labels = torch.arange(2 * len(picture)) < len(picture)
        return self.contrast(states, embeds) + slow, F.cross_entropy(torch.cat(logits), labels.long())


class Matching(Head):
    """Keeps [CLS] in front of a pair, as BLIP's own matching head does."""

    def __init__(self) -> None:
        super().__init__(MixedBert(), Vit())

    def forward(self, picture: Tensor, caption: list[str], match_head: str = "itm") -> Tensor:
        states = self.eyes(picture)
        text = self.tokenizer(caption, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
        read = dict(attention_mask=text.attention_mask, return_dict=True)
        if match_head == "itm":
            return self.score(self.words(text.input_ids, **read, **_seen(states)).last_hidden_state[:, 0])
        return self.contrast(states, self.words(text.input_ids, **read, mode="text").last_hidden_state)


class Answering(Head):
    def __init__(self) -> None:
        super().__init__(MixedBert(), Vit())
        self.decoder = nn.ModuleDict({"bert": FusionBert()})

    def forward(self, picture: Tensor, question: list[str], answer: list[str]) -> Tensor:
        states = self.eyes(picture)
        asked = self.tokenizer(question, padding="longest", truncation=True, max_length=LONGEST, return_tensors="pt")
        asked.input_ids[:, 0] = self.tokenizer.enc_token_id
        read = self.words(asked.input_ids, attention_mask=asked.attention_mask, return_dict=True, **_seen(states))
        text = self.tokenizer(answer, padding="longest", return_tensors="pt")
        given = dict(encoder_hidden_states=read.last_hidden_state, encoder_attention_mask=asked.attention_mask)
        answered = self.decoder["bert"](text.input_ids, attention_mask=text.attention_mask, **given)
        return self.score(answered.last_hidden_state[:, 0]).square().mean()


class Pairs(Head):
    """Two images a sentence in one batch: all first images, then all second ones."""

    def __init__(self) -> None:
        super().__init__(MixedBert(), Vit())

    def forward(self, pictures: Tensor, sentence: list[str], targets: Tensor) -> Tensor:
        first, second = torch.split(self.eyes(pictures), targets.shape[0])
        text = self.tokenizer(sentence, padding="longest", return_tensors="pt")
        text.input_ids[:, 0] = self.tokenizer.enc_token_id
        seen = _seen(torch.cat([first, second], dim=1))
        read = self.words(text.input_ids, attention_mask=text.attention_mask, return_dict=True, **seen)
        return F.cross_entropy(self.score(read.last_hidden_state[:, 0]), targets)


class Captioning(nn.Module):
    """A decoder alone: the caption is what it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.eyes, self.decoder = Vit(), nn.ModuleDict({"bert": FusionBert()})

    def forward(self, picture: Tensor, caption: list[str]) -> Tensor:
        states = self.eyes(picture)
        text = self.tokenizer(caption, padding="longest", return_tensors="pt")
        written = self.decoder["bert"](text.input_ids, attention_mask=text.attention_mask, **_seen(states))
        return written.last_hidden_state.square().mean()

    def generate(self, picture: Tensor) -> Tensor:
        return self.forward(picture, ["a picture of"] * len(picture))


class NamedVit(Vit):
    """LAVIS' tower: `forward_features` goes past the `forward` of its own class."""

    def forward_features(self, image: Tensor) -> Tensor:
        return super().forward(image)


class HalvedWords(Bert):
    """LAVIS' text encoder of ALBEF: it takes what a tokenizer returns, past its own `forward`."""

    def forward_text(self, tokenized_text: Tokens) -> Output:
        read = dict(attention_mask=tokenized_text.attention_mask, return_dict=True)
        return super().forward(tokenized_text.input_ids, **read, mode="text")

    def forward_automask(self, tokenized_text: Tokens, visual_embeds: Tensor) -> Output:
        read = dict(attention_mask=tokenized_text.attention_mask, return_dict=True, **_seen(visual_embeds))
        return super().forward(tokenized_text.input_ids, **read)


class MixedWords(MixedBert):
    """LAVIS' text encoder of BLIP."""

    def forward_automask(self, tokenized_text: Tokens, visual_embeds: Tensor) -> Output:
        read = dict(attention_mask=tokenized_text.attention_mask, return_dict=True, **_seen(visual_embeds))
        return super().forward(tokenized_text.input_ids, **read)


class LavisRetrieval(Head):
    """ALBEF's: the fusion half goes on from the text half."""

    def __init__(self) -> None:
        super().__init__(HalvedWords(), NamedVit(), twins=True)
        self.max_txt_len = LONGEST

    def forward(self, samples: dict[str, Any]) -> Output:
        states = self.eyes.forward_features(samples["image"])
        text = self.tokenizer(
            samples["text_input"], padding="max_length", truncation=True, max_length=self.max_txt_len,
            return_tensors="pt",
        )  # fmt: skip
        embeds = self.words.forward_text(text).last_hidden_state
        with torch.no_grad():
            slow = self.contrast(self.eyes_slow(samples["image"]), self.words_slow.forward_text(text).last_hidden_state)
        logits = []
        for image in (states, states.roll(1, dims=0)):
            read = dict(encoder_embeds=embeds, attention_mask=text.attention_mask, return_dict=True, mode="fusion")
            logits.append(self.score(self.words(**read, **_seen(image)).last_hidden_state[:, 0]))
        labels = torch.arange(2 * len(states)) < len(states)
        loss = F.cross_entropy(torch.cat(logits), labels.long())
        return Output(loss=loss, loss_itc=self.contrast(states, embeds) + slow)


class LavisClassification(Head):
    """Both halves in one call past `forward`; the choice of ALBEF or BLIP is that of its text encoder."""

    def __init__(self, words: nn.Module) -> None:
        super().__init__(words, NamedVit())

    def forward(self, samples: dict[str, Any]) -> Output:
        text = self.tokenizer(samples["text_input"], padding="longest", return_tensors="pt")
        states = self.eyes.forward_features(samples["image"])
        read = self.words.forward_automask(text, visual_embeds=states)
        return Output(loss=F.cross_entropy(self.score(read.last_hidden_state[:, 0]), samples["label"]))

    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Tensor:
        states = self.eyes.forward_features(samples["image"])
        if mode == "image":
            return states
        text = self.tokenizer(samples["text_input"], padding="longest", return_tensors="pt")
        return self.words.forward_automask(text, states).last_hidden_state
