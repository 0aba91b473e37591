package quota

import (
	"testing"
	"unsafe"
)

// A receipt is one piece of the copies of a decision, see Decision.
func TestReceiptIsOnePiece(t *testing.T) {
	const piece = 16
	var d Decision
	at, size, whole := unsafe.Offsetof(d.receipt), unsafe.Sizeof(d.receipt), unsafe.Sizeof(d)
	if at%piece != 0 || size != piece || whole%piece != 0 {
		t.Errorf("receipt: got %d bytes at %d of %d, want %d at a multiple, and a whole that is one", size, at, whole, piece)
	}
}
