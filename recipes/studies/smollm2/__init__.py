"""The study on SmolLM2-135M: does a weight help on a pretrained language model?"""
