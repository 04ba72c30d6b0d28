// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.28;

/// Deposit addresses whose money has one way out.
///
/// The factory is created through the deterministic CREATE2 deployer with the escrow as its only
/// constructor argument, so it has one address on every chain on which the escrow has one address.
/// The forwarder's address follows from the factory's (its first CREATE), a clone's address from both
/// and the salt: a deposit address is known, and can be paid, long before any of this is deployed.
interface Token {
    function balanceOf(address holder) external view returns (uint256);
    function transfer(address to, uint256 amount) external returns (bool);
}

/// What every deposit address runs, by delegatecall from its EIP-1167 clone.  It holds no state, takes
/// no argument, receives no ether and has one function: whoever calls it, the USDC goes to the escrow.
contract Forwarder {
    error UnknownChain(uint256 chainId);
    error NoEscrow();
    error TransferRefused();

    /// Circle's token, as published for these two chains; elsewhere there is nothing to forward.
    address private constant USDC_ETHEREUM = 0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48;
    address private constant USDC_BASE = 0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913;

    // Immutables live in this contract's code, so a clone cannot be given others.
    Token private immutable USDC;
    address private immutable ESCROW;

    constructor(address escrow) {
        if (escrow == address(0)) revert NoEscrow();
        if (block.chainid == 1) USDC = Token(USDC_ETHEREUM);
        else if (block.chainid == 8453) USDC = Token(USDC_BASE);
        else revert UnknownChain(block.chainid);
        ESCROW = escrow;
    }

    /// Send the whole USDC balance to the escrow; open to anyone.
    function sweep() external returns (uint256 amount) {
        amount = USDC.balanceOf(address(this));
        if (amount != 0 && !USDC.transfer(ESCROW, amount)) revert TransferRefused();
    }
}

/// Makes the clones and empties many of them in one transaction.
contract ForwarderFactory {
    event Swept(bytes32 indexed salt, uint256 amount);
    event SweepFailed(bytes32 indexed salt);

    Forwarder public immutable FORWARDER;

    constructor(address escrow) {
        FORWARDER = new Forwarder(escrow);
    }

    /// The deposit address of `salt`, deployed or not.
    function addressOf(bytes32 salt) public view returns (address) {
        bytes32 digest = keccak256(abi.encodePacked(hex"ff", address(this), salt, keccak256(cloneCode())));
        return address(uint160(uint256(digest)));
    }

    /// Empty the deposit addresses of `salts` into the escrow; open to anyone.  One that fails (say, a
    /// blacklisted one) is named by SweepFailed and does not stop the others; an empty one is passed over.
    function sweep(bytes32[] calldata salts) external {
        bytes memory code = cloneCode();
        bytes32 codeHash = keccak256(code);
        for (uint256 i = 0; i < salts.length; ++i) {
            bytes32 salt = salts[i];
            bytes32 digest = keccak256(abi.encodePacked(hex"ff", address(this), salt, codeHash));
            address clone = address(uint160(uint256(digest)));
            if (clone.code.length == 0) {
                address made;
                assembly ("memory-safe") {
                    made := create2(0, add(code, 32), mload(code), salt)
                }
                if (made != clone) {
                    emit SweepFailed(salt);
                    continue;
                }
            }
            try Forwarder(clone).sweep() returns (uint256 amount) {
                if (amount != 0) emit Swept(salt, amount);
            } catch {
                emit SweepFailed(salt);
            }
        }
    }

    /// EIP-1167: ten bytes that return the next 45, which delegate every call to FORWARDER.
    function cloneCode() private view returns (bytes memory) {
        return abi.encodePacked(
            hex"3d602d80600a3d3981f3363d3d373d3d3d363d73", address(FORWARDER), hex"5af43d82803e903d91602b57fd5bf3"
        );
    }
}
