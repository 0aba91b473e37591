//go:build !unix

package pgserver

import "syscall"

// PostgreSQL is not started on these systems: the package compiles, so that ./... does.
const immediateShutdown = syscall.SIGKILL

type sysProcAttr = syscall.SysProcAttr

func attributes(int, int) *sysProcAttr { return nil }
