package rueidis

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// Calls under way end before a pause begins its work, and later calls wait for its end, or leave with their context.
func TestPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pauses
		ctx, cancel := context.WithCancel(t.Context())
		if err := p.enter(ctx); err != nil {
			t.Fatalf("enter: got %v, want nil", err)
		}
		began, release := false, make(chan struct{})
		go p.during(time.Second, func() { began = true; <-release })
		synctest.Wait()
		left, entered := make(chan error, 1), make(chan error, 1)
		go func() { left <- p.enter(ctx) }()
		go func() { entered <- p.enter(context.Background()) }()
		synctest.Wait()
		if began {
			t.Error("pause while a call is under way: got work, want none yet")
		}
		p.exit()
		synctest.Wait()
		if !began {
			t.Error("pause without a call under way: got no work, want some")
		}
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("call whose context ends in a pause: got %v, want %v", err, context.Canceled)
		}
		close(release)
		if err := <-entered; err != nil {
			t.Errorf("call that waited: got %v, want nil", err)
		}

		// The last call does not end: the pause gives up, and the next call goes on.
		p.during(time.Second, func() { t.Error("pause while a call hangs: got work, want none") })
		if err := p.enter(context.Background()); err != nil {
			t.Errorf("call after that: got %v, want nil", err)
		}

		// Nor does a pause go on whose work panics.
		p.exit()
		p.exit()
		func() {
			defer func() { recover() }()
			p.during(time.Second, func() { panic("a bug in a hook") })
		}()
		if err := p.enter(context.Background()); err != nil {
			t.Errorf("call after a pause that panicked: got %v, want nil", err)
		}
	})
}
