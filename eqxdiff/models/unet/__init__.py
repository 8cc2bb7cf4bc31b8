"""The text-conditional UNet, its ControlNets, and what the families around them share."""
