from rlhf_trainer.cli import main

main()
