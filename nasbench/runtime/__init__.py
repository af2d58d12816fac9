"""Running a decoder: CUDA graphs, generation, throughput, roofline, memory."""
