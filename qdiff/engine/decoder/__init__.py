"""The decoder of the autoencoder in bfloat16 or on integer codes, for whole feature maps or streamed.

`layers` has its convolutions, `network` the decoder that is made of them, `whole` and `streamed` two ways to run it.
"""
