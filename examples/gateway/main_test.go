package main

import (
	"os/exec"
	"testing"
	"time"
)

// The runs check themselves.
func TestInMemory(t *testing.T) {
	t.Parallel()
	if err := inMemory(t.Context(), 4*time.Second); err != nil {
		t.Error(err)
	}
}

// TestProcesses runs the fleet of four processes as users do, for a process of a test has other flags.
func TestProcesses(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("no redis-server")
	}
	program := t.TempDir() + "/gateway"
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	out, err := exec.Command(program, "-redis", "-for", "4s").CombinedOutput()
	if err != nil {
		t.Errorf("gateway -redis: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}
