//go:build !unix

package redisserver

import "syscall"

// There is no redis-server for these systems: the package compiles, so that ./... does, and tests skip.
const sigStop, sigCont = syscall.SIGKILL, syscall.SIGKILL

func sysProcAttr() *syscall.SysProcAttr { return nil }

func awaitStopped(int) {}
