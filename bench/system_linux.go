package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// nap sleeps for about 0.1 ms. The runtime's timers may be a millisecond late while nothing else happens.
func nap() { _ = syscall.Nanosleep(&syscall.Timespec{Nsec: 50_000}, nil) }

// canPin returns the reason why threads cannot be kept on processors here, or nil.
func canPin() error {
	_, err := processors()
	return err
}

// processors returns the processors that this process may use, of which there are two at least.
func processors() (all unix.CPUSet, err error) {
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return all, err
	}
	if n := all.Count(); n < 2 {
		return all, fmt.Errorf("this process may use %d processor; needed: 2", n)
	}
	return all, nil
}

// pin keeps this process on its first processor, and the processes of servers on that one or on the second one. The
// client then has one thread that runs Go code. undo must be called.
func pin(on placement, servers []int) (undo func() error, err error) {
	all, err := processors()
	if err != nil {
		return nil, err
	}
	var two []unix.CPUSet // of one processor each
	for i := 0; len(two) < 2; i++ {
		if all.IsSet(i) {
			var one unix.CPUSet
			one.Set(i)
			two = append(two, one)
		}
	}
	if on == onOne {
		two[1] = two[0]
	}
	threads := runtime.GOMAXPROCS(1)
	place := func(client, server *unix.CPUSet) error {
		for _, pid := range servers {
			if err := placeThreads(pid, server); err != nil {
				return err
			}
		}
		return placeThreads(os.Getpid(), client)
	}
	undo = func() error {
		runtime.GOMAXPROCS(threads)
		return place(&all, &all)
	}
	if err := place(&two[0], &two[1]); err != nil {
		_ = undo()
		return nil, err
	}
	return undo, nil
}

// placeThreads keeps all threads of a process on some processors. A new thread is where the thread was that made it, so
// the list is read until it has no thread that is unknown.
func placeThreads(pid int, on *unix.CPUSet) error {
	known := []string{}
	for {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		unknown := 0
		for _, e := range entries {
			if slices.Contains(known, e.Name()) {
				continue
			}
			unknown++
			known = append(known, e.Name())
			id, err := strconv.Atoi(e.Name())
			if err != nil {
				return err
			}
			if err := unix.SchedSetaffinity(id, on); err != nil && !errors.Is(err, unix.ESRCH) { // it may have ended
				return err
			}
		}
		if unknown == 0 {
			return nil
		}
	}
}
