"""specbasis as a Space of the Hub: two models of the Hub, what finetuning changed between them, and the page."""

from specbasis.cli.web import Reach, interface, serve

serve(interface(Reach(root=None, seconds=600)))
