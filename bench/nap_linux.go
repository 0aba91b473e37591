package main

import "syscall"

// nap sleeps for about 0.1 ms. The runtime's timers may be a millisecond late while nothing else happens.
func nap() { _ = syscall.Nanosleep(&syscall.Timespec{Nsec: 50_000}, nil) }
