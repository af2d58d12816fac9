"""Command lines as people type them: `--help` shows them, and a test parses every one."""

from __future__ import annotations

EXAMPLES = (
    "nasbench quickstart",
    "nasbench quickstart --dry-run",
    "nasbench run smollm2-135m --set data=text.jsonl --dry-run",
    "nasbench run mine.toml --out runs/mine",
    "nasbench init mine.toml --model ./SmolLM2-360M --blocks 'W256 J'",
    "nasbench doctor --json",
    "nasbench devices",
    "nasbench models",
    "nasbench profile --model qwen3-1.7b --blocks 'A W256 J' --contexts 4k,64k --batches 1,max",
    "nasbench profile --model default --dry-run",
    "nasbench db check profiles",
    "nasbench db estimate --from nvidia-h200 --to nvidia-rtx-3090",
    "nasbench db judge reports/cost-h200/measured.csv",
    "nasbench cost '14J A 4J A 2W 6J' --model jet-nemotron-2b --profile nvidia-h100-sxm --context 64k --batch 128",
    "nasbench throughput 28A --model qwen2.5-1.5b --context 4k --batch 8",
    "nasbench corpus generate --out own.jsonl --tokens 4M",
    "nasbench distill --out runs/mine --model ./SmolLM2-360M --blocks 'W256 J' --data ./text",
    "nasbench distill --out runs/mine --supernet-tokens 1M --dry-run",
    "nasbench select-block --blocks J,G,M,H64 --data ./text --tasks retrieval@512:100",
    "nasbench search runs/mine --strategy beam -k 2,4,8 --context 8k --batch 4",
    "nasbench eval runs/mine --placement '2W 2A 4W' --tasks loss,kl,retrieval@512",
    "nasbench finalize runs/mine -k 4 --tokens 1M",
    "nasbench finalize runs/mine --placement '2W 2A 4W' --dry-run",
    "nasbench validate runs/mine --context 8k --batch 4",
    "nasbench report runs/mine",
    "nasbench report --compare runs/mine runs/other",
    "nasbench export runs/mine --placement '2W 2A 4W' --out hybrid --format hf",
    "nasbench generate hybrid --prompt 'The capital of France is'",
)
