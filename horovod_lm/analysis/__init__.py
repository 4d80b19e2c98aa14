"""The ring allreduce, the cost model of scaling, and Horovod's timeline."""
