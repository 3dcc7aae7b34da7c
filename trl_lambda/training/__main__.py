from . import main

if __name__ == "__main__":  # and not in the processes that a data loader starts
    main()
