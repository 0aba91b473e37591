//go:build unix && !linux

package redisserver

import (
	"syscall"
	"time"
)

const sigStop, sigCont = syscall.SIGSTOP, syscall.SIGCONT

func sysProcAttr() *syscall.SysProcAttr { return nil }

// awaitStopped gives a SIGSTOP time to take effect.
func awaitStopped(int) { time.Sleep(10 * time.Millisecond) }
