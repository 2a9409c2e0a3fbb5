"""Where a guest spends its time: samples of its vCPUs, and what is made of them."""
