"""Tools for your own weights and data, apart from the studies: `zeroshot` measures a CLIP on a folder of classes
(`classes`, `evaluate`, `outliers`); `retrieval` one on Flickr30K or COCO (`karpathy`, `rerank`, `signs`); `alignment`
fine-tunes one under selection on your pairs (`pairs`, `resume`)."""
