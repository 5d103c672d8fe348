"""`mindvl doctor`: is this machine fit to train MindVL through the bridge? The checks are those of npu_bridge.doctor; what it trains is here."""
