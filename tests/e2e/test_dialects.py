"""Each dialect over a socket, asked by bare httpx as its client asks, and read as its client reads: the scores are `/score`'s.

Quoted are the lines that ask and the lines that read, from the versions named. Beside them the docstrings say nothing.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from app.artifacts import DEMO_PATH
from tests.e2e.server import Server

pytestmark = pytest.mark.e2e

CARTOONS = json.loads((DEMO_PATH / "cartoons" / "captions.json").read_text())
PENGUIN = "penguin-office.png"
CAPTIONS: list[str] = CARTOONS[PENGUIN]
BYTES = (DEMO_PATH / "cartoons" / PENGUIN).read_bytes()
DATA_URL = "data:image/png;base64," + base64.b64encode(BYTES).decode()
PROMPT = "<|im_start|>system\nYou are funny.<|im_end|>\n<|im_start|>user\nWrite a caption.<|im_end|>\n<|im_start|>assistant\n"
NEAR = {"rel": 0, "abs": 2e-5}  # float32, in other company


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def image_id(client: httpx.Client) -> str:
    return str(client.put("/images", content=BYTES).raise_for_status().json()["image_id"])


@pytest.fixture(scope="module")
def scores(client: httpx.Client, image_id: str) -> list[float]:
    return list(client.post("/score", json={"image": image_id, "captions": CAPTIONS}).raise_for_status().json()["scores"])


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


def asked(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    return client.post(path, json=body).raise_for_status().json()


@pytest.mark.parametrize("index", range(len(CAPTIONS)))
def test_openrlhf(client: httpx.Client, image_id: str, scores: list[float], index: int) -> None:
    """OpenRLHF 0.11.2, openrlhf/utils/agent.py, SingleTurnAgentExecutor:

        query = hf_tokenizer.decode(output["observation_tokens"], skip_special_tokens=False)
        payload = {"query": queries_list[..], "prompts": prompts_list[..], "labels": labels_list[..]}
        async with session.post(url, json=data) as response:
            response.raise_for_status()
            return await response.json()
        score_value = rewards_info.get("scores")
        output.update(reward=rewards_info.get("rewards"), scores=score_value, extra_logs=rewards_info.get("extra_logs") or {})

    openrlhf/trainer/ppo_utils/samples_generator.py:

        info["reward"] = torch.tensor([reward_val])
        for key, value in extra_logs.items():
            info[key] = torch.tensor([value])
        scores = [e.scores[0].item() for e in experiences]
        if not (min_r < avg_reward < max_r):    # between 0 and 1 by default
    """
    query = PROMPT + CAPTIONS[index] + "<|im_end|>"
    told = asked(client, "/get_reward", {"query": [query], "prompts": [PROMPT], "labels": [json.dumps({"image_id": image_id})]})
    rewards, filtered = torch.tensor([told.get("rewards")]), torch.tensor([told.get("scores")])
    assert rewards[0].item() == pytest.approx(scores[index], **NEAR)
    assert 0 < filtered[0].item() < 1
    assert filtered[0].item() == pytest.approx(sigmoid(scores[index]), **NEAR)
    logs = {key: torch.tensor([value]).flatten() for key, value in told["extra_logs"].items()}
    assert {key: value.tolist() for key, value in logs.items()} == {"caption_chars": [float(len(CAPTIONS[index]))]}


@pytest.mark.parametrize("index", range(len(CAPTIONS)))
def test_slime(client: httpx.Client, image_id: str, scores: list[float], index: int) -> None:
    """slime, slime/rollout/rm_hub/__init__.py at 0b420f1:

        payload = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
        async with session.post(args.rm_url, json=payload) as resp:
            resp.raise_for_status()
            return await resp.json()

    The number is the sample's reward; with `--reward-key reward` it is `sample.reward[args.reward_key]`.
    """
    body = {"prompt": PROMPT, "response": CAPTIONS[index], "label": {"image_id": image_id}}
    assert asked(client, "/rm", body) == pytest.approx(scores[index], **NEAR)
    assert asked(client, "/rm?format=dict", body)["reward"] == pytest.approx(scores[index], **NEAR)
    turns = [{"role": "user", "content": f"<image:{image_id}> Write a caption."}]
    assert asked(client, "/rm", {**body, "prompt": turns, "label": None}) == pytest.approx(scores[index], **NEAR)


@pytest.mark.parametrize("index", range(len(CAPTIONS)))
def test_verl(client: httpx.Client, image_id: str, scores: list[float], index: int) -> None:
    """verl 0.9.1, verl/experimental/reward_loop/reward_loop.py, RewardLoopWorker.compute_score_disrm:

        payloads = {"model": model_name, "input": disrm_prompt, "use_activation": False}
        output = await self._post_request(payloads, "classify")
        rm_score = output["data"][-1]["probs"][-1]

    and with SGLang

        payloads = {"model": model_name, "input": disrm_prompt}
        output = await self._post_request(payloads, "v1/embeddings")
        rm_score = output["data"][-1]["embedding"][-1]
    """
    chat = f"<|im_start|>user\n<image:{image_id}>Write a caption.<|im_end|>\n<|im_start|>assistant\n{CAPTIONS[index]}<|im_end|>\n"
    output = asked(client, "/classify", {"model": "any", "input": chat, "use_activation": False})
    assert output["data"][-1]["probs"][-1] == pytest.approx(scores[index], **NEAR)
    output = asked(client, "/v1/embeddings", {"model": "any", "input": chat})
    assert output["data"][-1]["embedding"][-1] == pytest.approx(scores[index], **NEAR)


def test_vllm_classify_and_pooling(client: httpx.Client, scores: list[float]) -> None:
    """vLLM, examples/pooling/classify/vision_classification_online.py at ac7670f and reward/sequence_reward_online.py at 3f9a13d:

        model = requests.get(base_url + "/v1/models").json()["data"][0]["id"]
        requests.post(api_url, json={"model": model, "messages": [{"role": "user", "content": [..]}]}).json()

    vllm/frontend/entrypoints/pooling/classify/protocol.py and pooling/protocol.py: the answer's models, read here as
    `data[i].probs` and `data[i].data`; with `encoding_format` base64, float32 as OpenAI's client unpacks it.
    """
    model = client.get("/v1/models").json()["data"][0]["id"]
    user = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": DATA_URL}}]}
    body = {"model": model, "messages": [user, {"role": "assistant", "content": CAPTIONS[0]}]}
    (found,) = asked(client, "/classify", body)["data"]
    assert (found["index"], found["num_classes"], found["label"]) == (0, 1, "LABEL_0")
    assert found["probs"] == [pytest.approx(scores[0], **NEAR)]
    (found,) = asked(client, "/classify", {**body, "use_activation": True})["data"]
    assert found["probs"] == [pytest.approx(sigmoid(scores[0]), **NEAR)]
    alone = {"role": "user", "content": [*user["content"], {"type": "text", "text": CAPTIONS[1]}]}  # type: ignore[misc]
    (found,) = asked(client, "/pooling", {"model": model, "messages": [alone]})["data"]
    assert found == {"index": 0, "object": "pooling", "data": [pytest.approx(scores[1], **NEAR)]}
    (found,) = asked(client, "/pooling", {"model": model, "messages": [alone], "encoding_format": "base64"})["data"]
    assert struct.unpack("<f", base64.b64decode(found["data"])) == (pytest.approx(scores[1], **NEAR),)


def test_vllm_score(client: httpx.Client, scores: list[float]) -> None:
    """vLLM, vllm/frontend/entrypoints/pooling/scoring/protocol.py at 055e47c, ScoreResponse; examples/pooling/score/score_api_online.py:

    response.json()["data"][i]["score"]
    """
    query = {"content": [{"type": "image_url", "image_url": {"url": DATA_URL}}]}
    told = asked(client, "/v1/score", {"model": "any", "queries": query, "documents": CAPTIONS})
    assert [each["index"] for each in told["data"]] == list(range(len(CAPTIONS)))
    assert [each["score"] for each in told["data"]] == pytest.approx(scores, **NEAR)
    assert set(told) == {"id", "object", "created", "model", "data", "usage"}
    told = asked(client, "/v1/score", {"model": "any", "text_1": [DATA_URL] * len(CAPTIONS), "text_2": CAPTIONS})
    assert [each["score"] for each in told["data"]] == pytest.approx(scores, **NEAR)


def test_jina_rerank(client: httpx.Client, scores: list[float]) -> None:
    """langchain-community, document_compressors/jina_rerank.py at 08b4fce:

    data = {"query": query, "documents": docs, "model": model, "top_n": top_n}
    resp = self.session.post(JINA_API_URL, json=data).json()
    if "results" not in resp:
        raise RuntimeError(resp["detail"])
    for res in results:
        result_dicts.append({"index": res["index"], "relevance_score": res["relevance_score"]})
    """
    body = {"query": DATA_URL, "documents": CAPTIONS, "model": "any", "top_n": None}
    results = asked(client, "/v1/rerank", body)["results"]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    assert [each["index"] for each in results] == order
    assert [each["relevance_score"] for each in results] == pytest.approx([scores[index] for index in order], **NEAR)
    assert [each["document"]["text"] for each in results] == [CAPTIONS[index] for index in order]
    assert [each["index"] for each in asked(client, "/rerank", {**body, "top_n": 2})["results"]] == order[:2]


def test_cohere_rerank(client: httpx.Client, scores: list[float]) -> None:
    """cohere 7.3.1, cohere/v2/raw_client.py:

        _response = self._client_wrapper.httpx_client.request("v2/rerank", method="POST",
            json={"model": model, "query": query, "documents": documents, "top_n": top_n, ..})

    cohere/v2/types/v2rerank_response.py and v2rerank_response_results_item.py:

        id: typing.Optional[str] = None
        results: typing.List[V2RerankResponseResultsItem]     # index: int, relevance_score: float
    """
    told = asked(client, "/v2/rerank", {"model": "any", "query": DATA_URL, "documents": CAPTIONS, "top_n": 3})
    assert isinstance(told["id"], str)
    assert [set(each) for each in told["results"]] == [{"index", "relevance_score"}] * 3
    assert all(each["relevance_score"] == pytest.approx(scores[each["index"]], **NEAR) for each in told["results"])


def test_tei_rerank_and_predict(client: httpx.Client, image_id: str, scores: list[float]) -> None:
    """llama-index-postprocessor-tei-rerank, base.py at 18b5f1b:

        json_data = {"query": query, "texts": texts}
        scores = client.post(f"{self.base_url}/rerank", json=json_data).json()
        for score_item in scores:
            nodes[score_item["index"]].score = float(score_item["score"])

    text-embeddings-inference, router/src/http/types.rs at 02506d0: Rank, Prediction, PredictResponse; `raw_scores` false by default.
    """
    told = asked(client, "/rerank", {"query": image_id, "texts": CAPTIONS, "raw_scores": True})
    assert {each["index"]: float(each["score"]) for each in told} == pytest.approx(dict(enumerate(scores)), **NEAR)
    assert [each["score"] for each in told] == sorted((each["score"] for each in told), reverse=True)
    told = asked(client, "/rerank", {"query": image_id, "texts": CAPTIONS, "return_text": True})
    assert all(each["score"] == pytest.approx(sigmoid(scores[each["index"]]), **NEAR) for each in told)
    assert all(each["text"] == CAPTIONS[each["index"]] for each in told)
    told = asked(client, "/predict", {"inputs": [[image_id, caption] for caption in CAPTIONS], "raw_scores": True})
    assert [[each["label"] for each in batch] for batch in told] == [["LABEL_0"]] * len(CAPTIONS)
    assert [batch[0]["score"] for batch in told] == pytest.approx(scores, **NEAR)
    told = asked(client, "/predict", {"inputs": [image_id, CAPTIONS[0]]})
    assert told == [{"label": "LABEL_0", "score": pytest.approx(sigmoid(scores[0]), **NEAR)}]


def test_openai_models(client: httpx.Client) -> None:
    """openai 3.57.0, openai/types/model.py: `id: str`, `created: int`, `object: Literal["model"]`, `owned_by: str`."""
    told = client.get("/v1/models").raise_for_status().json()
    (model,) = told["data"]
    assert (told["object"], model["object"], model["id"]) == ("list", "model", "demo")
    assert isinstance(model["created"], int)
    assert isinstance(model["owned_by"], str)
