package redisserver

import (
	"bytes"
	"os"
	"strconv"
	"syscall"
	"time"
)

const sigStop, sigCont = syscall.SIGSTOP, syscall.SIGCONT

// sysProcAttr makes the kernel end the server if the test process dies without cleaning up (a panic, a test
// timeout).
func sysProcAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }

// awaitStopped returns once the process no longer runs: kill(2) returns earlier than a SIGSTOP takes effect.
func awaitStopped(pid int) {
	for range 1000 {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			return
		}
		if i := bytes.LastIndexByte(stat, ')'); i < 0 || i+2 >= len(stat) || stat[i+2] == 'T' {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
}
