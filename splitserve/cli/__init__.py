"""The command line: ``splitserve up | router | prefill | decode | pull | chat``."""
