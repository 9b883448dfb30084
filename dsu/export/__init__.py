"""The whole network as one ONNX file that has shown to give the same masks, and a runner for it without torch."""
