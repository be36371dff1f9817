"""Training loops that call the agent, a module each; each needs its library, and nothing else imports it.

A loop of your own needs no callback: `Monitor.step` after each optimizer step, `Monitor.log` for what is known later.
"""
