//go:build !unix

package pgserver

import "syscall"

// PostgreSQL is not started on these systems: the package compiles, so that ./... does.
const immediateShutdown = syscall.SIGKILL

func attributes(int, int) *syscall.SysProcAttr { return nil }
