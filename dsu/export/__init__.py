"""Export of the whole network as one ONNX file, checked to give the same masks, and a runner without torch."""
