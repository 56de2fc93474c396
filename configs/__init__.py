"""One YAML file a run; `nsvq.configs.__path__` says where they are."""
